"""Format and accuracy rewards over a table of texts, from bytes and from token ids."""

import pytest
import torch

from boxgrpo.kernels import ANSWER_FORMATS, VocabularyBytes, grounding_rewards, grounding_rewards_from_ids, pack_texts
from boxgrpo.kernels.vocabulary import BRACKET, EOS, PLAIN, TEXT, unpack_entries
from kernel_cases import assert_refused

GOLD = (100.0, 200.0, 300.0, 400.0)
BOX = "(100, 200), (300, 400)"
GOOD = f"<think>a</think><answer>{BOX}</answer>"
EXACT, NOTHING = (100, 200, 300, 400), (0, 0, 0, 0)
BIG = 2**31 - 1

# text, answer format -> format reward, box (None: not found), IoU with GOLD
TABLE = [
    ("think", GOOD, 1, EXACT, 1.0),
    ("think", "x" + GOOD, 1, EXACT, 1.0),  # found, not matched from the start
    ("think", b"\xff\xfe<think>\x80</think>" + GOOD[16:].encode(), 1, EXACT, 1.0),  # no UTF-8
    ("think", GOOD + "\n", 1, EXACT, 1.0),  # Python's $ stands before a last newline
    ("think", GOOD + "\n\n", 0, EXACT, 1.0),
    ("think", GOOD + " ", 0, EXACT, 1.0),
    ("think", GOOD + GOOD, 1, EXACT, 1.0),
    ("think", f"<think>a\nb</think> \t\r\n\f\v<answer>{BOX}</answer>", 1, EXACT, 1.0),
    ("think", f"<think>a</think>,<answer>{BOX}</answer>", 0, EXACT, 1.0),
    ("think", f"<think>a</think> b</think><answer>{BOX}</answer>", 1, EXACT, 1.0),  # .*? reaches on to the next tag
    ("think", f"<think></think><answer>{BOX}</answer>", 1, EXACT, 1.0),
    ("think", f"</think><answer>{BOX}</answer>", 0, EXACT, 1.0),
    ("think", f"<answer>{BOX}</answer>", 0, EXACT, 1.0),
    ("think", f"<think>a</think><answer> {BOX}</answer>", 0, EXACT, 1.0),
    ("think", f"<think>a</think><answer>{BOX}", 0, None, 0.0),
    ("think", f"<think>{BOX}</think><answer></answer>", 0, None, 0.0),
    ("think", BOX, 0, None, 0.0),
    ("think", "", 0, None, 0.0),
    ("think", f"<answer>no</answer><answer>{BOX}</answer>", 0, None, 0.0),  # only the first answer counts
    ("think", f"<think>a</think><answer>no</answer>{GOOD}", 1, None, 0.0),  # and the format looks on
    ("think", f"<answer>(0, 0), (1, 1) {BOX}</answer>", 0, (0, 0, 1, 1), 0.0),  # and its first box
    ("think", "<answer>(100,200),(300,400)</answer>", 0, EXACT, 1.0),
    ("think", "<answer>(100,\n200),\n(300, 400)</answer>", 0, EXACT, 1.0),
    ("think", "<answer>(100 ,200),(300,400)</answer>", 0, None, 0.0),
    ("think", "<answer>(100, 200) (300, 400)</answer>", 0, None, 0.0),
    ("think", "<answer>[100, 200, 300, 400]</answer>", 0, None, 0.0),
    ("think", "<answer>(-100, 200), (300, 400)</answer>", 0, None, 0.0),
    ("think", "<answer>(100.5, 200), (300, 400)</answer>", 0, None, 0.0),
    ("think", "<answer>(١٠٠, 200), (300, 400)</answer>", 0, None, 0.0),  # digits are ASCII
    ("think", "<answer>(100,\u00a0200), (300, 400)</answer>", 0, None, 0.0),  # and so are spaces
    ("think", "<think>a</think><answer>(100, 200), (200, 400)</answer>", 1, (100, 200, 200, 400), 0.5),
    ("think", "<think>a</think><answer>(300, 400), (100, 200)</answer>", 1, (300, 400, 100, 200), 0.0),
    ("think", "<think>a</think><answer>(100, 200), (100, 400)</answer>", 1, (100, 200, 100, 400), 0.0),
    ("think", "<think>a</think><answer>(100, 200), (300, 1200)</answer>", 1, (100, 200, 300, 1200), 0.2),
    ("think", "<think>a</think><answer>(007, 0), (2147483648, 99999999999)</answer>", 1, (7, 0, BIG, BIG), 0.0),
    ("think", f"<think>a</think><answer>({'9' * 5000}, {'0' * 5000}1), (3, 4)</answer>", 1, (BIG, 1, 3, 4), 0.0),
    ("box", BOX, 1, EXACT, 1.0),
    ("box", f"The box is {BOX}.", 1, EXACT, 1.0),
    ("box", f"(1, 2), (3, 4) {BOX}", 1, (1, 2, 3, 4), 0.0),
    ("box", f"<answer>none</answer>{BOX}", 1, EXACT, 1.0),
    ("box", GOOD, 1, EXACT, 1.0),
    ("box", "(100, 200), (300, 400", 0, None, 0.0),
    ("box", "", 0, None, 0.0),
    ("box", "((100,200),(300,400)", 1, EXACT, 1.0),
    ("box", "(1,2),(3,(100,200),(300,400)", 1, EXACT, 1.0),
    ("box", "(1,2),(3,4,(100,200),(300,400),(5,6)", 1, EXACT, 1.0),
    ("box", "(1,2)(100,200),(300,400)", 1, EXACT, 1.0),
    ("marked", "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>", 1, EXACT, 1.0),
    ("marked", "<|box_start|>(100, 200), (300, 400)<|box_end|><|box_start|>(1,2),(3,4)<|box_end|>", 1, EXACT, 1.0),
    ("marked", "<|box_start|>(1,2),(3,4)</|box_end|><|box_start|>(100,200),(300,400)<|box_end|>", 1, EXACT, 1.0),
    ("marked", "<|box_start|><|box_start|>(100,200),(300,400)<|box_end|>", 1, EXACT, 1.0),
    ("marked", "(100,200),(300,400)", 0, None, 0.0),
    ("marked", "<|box_start|>(100,200),(300,400)", 0, None, 0.0),
    ("marked", "<|box_start|> (100,200),(300,400)<|box_end|>", 0, None, 0.0),
    ("marked", "<|box_start|>(1,2),(100,200),(300,400)<|box_end|>", 0, None, 0.0),  # more than one box is none
    ("list", "[100, 200, 300, 400]", 1, EXACT, 1.0),
    ("list", '{"bbox_2d": [\n 100,\n 200,\n 300,\n 400\n]}', 1, EXACT, 1.0),
    ("list", "[[100,200,300,400],[1,2,3,4]]", 1, EXACT, 1.0),
    ("list", "[1, 2, 3] [1, 2, 3, 4, 5] [100, 200, 300, 400]", 1, EXACT, 1.0),
    # case 7: any number of JSON, quoted or not
    ("list", "[12.333333333333334, 30, 200, 150]", 1, (12.333333333333334, 30, 200, 150), 0.0),
    ("list", "[100.0, 2e2, 3.0E+2, 4000000e-4]", 1, EXACT, 1.0),
    ("list", '["100", "2e2", "300.0", "400"]', 1, EXACT, 1.0),
    ("list", "[-100, 200, 300, 400]", 1, (-100, 200, 300, 400), 0.5),
    ("list", "[0.0000000009, -1e99, 1E0000000123, 5e-123]", 1, (0, -BIG, BIG, 0), 0.0),
    ("list", "[0.1, 0.2, 0.3, 0.4] [100, 200, 300, 400]", 1, (0.1, 0.2, 0.3, 0.4), 0.0),
    ("list", "[1e, 2, 3, 4] [1e+, 2, 3, 4] [--1, 2, 3, 4] [+1, 2, 3, 4] [1-, 2, 3, 4]", 0, None, 0.0),
    ("list", '[""1", 2, 3, 4] [- 1, 2, 3, 4] [NaN, 2, 3, 4] [1e2.5, 2, 3, 4]', 0, None, 0.0),
    ("list", BOX, 0, None, 0.0),
    ("list", "[100 , 200, 300, 400]", 0, None, 0.0),
    ("fractions", "[0.1, 0.2, 0.3, 0.4]", 1, EXACT, 1.0),
    ("fractions", "[0.100000000999,0.2,0.3,0.4]", 1, EXACT, 1.0),  # nine decimals count
    ("fractions", "[0, 0.25, 1, 001.000]", 1, (0, 250, 1000, 1000), 30 / 760),
    ("fractions", "[0.1, 0.2, 0.3, 0.4", 0, None, 0.0),
    ("fractions", "[.1, 0.2, 0.3, 0.4]", 0, None, 0.0),
    ("fractions", "[1., 0.2, 0.3, 0.4]", 0, None, 0.0),
    ("fractions", '[1e-1, "0.2", 30e-2, 0.04E1]', 1, EXACT, 1.0),
    ("fractions", "[-0.1, 0.2, 0.3, 0.4]", 1, (-100, 200, 300, 400), 0.5),
    ("fractions", "[0.1.2, 0.2, 0.3, 0.4] [0.1, 0.2, 0.3, 0.4]", 1, EXACT, 1.0),
    ("fractions", "[1.2, 0, 1.3, 99999999999.5]", 1, (1200, 0, 1300, BIG), 0.0),  # leaves the image
]


def packed(texts):
    return pack_texts([t.encode() if isinstance(t, str) else t for t in texts])


def gold(n):
    return torch.tensor([GOLD]).expand(n, 4).contiguous()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("kind", ANSWER_FORMATS)
def test_the_table(kind, backend):
    rows = [row[1:] for row in TABLE if row[0] == kind]
    texts, formats, boxes, ious = zip(*rows, strict=True)
    got = grounding_rewards(*packed(texts), gold(len(rows)), answer_format=kind, backend=backend)
    wrong = [
        (text, f, b, a)
        for text, f, b, a, want_f, want_b, want_a in zip(
            texts, got.format.tolist(), got.boxes.tolist(), got.accuracy.tolist(), formats, boxes, ious, strict=True
        )
        if f != want_f or b != torch.tensor(want_b or NOTHING).float().tolist() or abs(a - want_a) > 1e-6
    ]
    assert not wrong
    assert got.found.tolist() == [box is not None for box in boxes]
    assert [x.dtype for x in got] == [torch.float32] * 3 + [torch.bool, torch.int32]


def test_a_tensor_of_formats_chooses_for_each_row():
    kinds, texts, formats, _, _ = zip(*TABLE, strict=True)
    codes = torch.tensor([ANSWER_FORMATS[kind] for kind in kinds], dtype=torch.uint8)
    got = grounding_rewards(*packed(texts), gold(len(texts)), answer_format=codes)
    assert got.format.tolist() == list(formats)


@pytest.mark.parametrize("kind", ANSWER_FORMATS)
def test_spans_are_byte_offsets_of_the_contents(kind):
    """In bytes, not characters; of the first pair of tags; whatever the format."""
    text = "né <think>été</think><answer>x</answer> <answer>y</answer>"
    rows = [text, "<answer>z</answer>", "<think>open", ""]
    spans = grounding_rewards(*packed(rows), gold(4), answer_format=kind).spans.tolist()
    raw = text.encode()
    assert raw[slice(*spans[0][:2])] == "été".encode() and raw[slice(*spans[0][2:])] == b"x"
    assert spans[1:] == [[-1, -1, 8, 9], [-1] * 4, [-1] * 4]


def test_no_completions():
    got = grounding_rewards(*packed([]), gold(0))
    assert [tuple(x.shape) for x in got] == [(0,), (0,), (0, 4), (0,), (0, 4)]
    table = VocabularyBytes.build([b"a"], [])
    ids = torch.zeros(0, 5, dtype=torch.int64)
    assert grounding_rewards_from_ids(ids, ids[:, 0], table, gold(0)).spans.shape == (0, 4)


PIECES = [b"<think>", b"a", b"</think>", b"<answer>", b"</answer>", b"(", b")", b", ", b"100", b"200", b"300", b"400"]
END, IMAGE = len(PIECES), len(PIECES) + 1


def table_of_pieces():
    return VocabularyBytes.build([*PIECES, b"", b"", b"\xc3", b"\xa9"], [END])


def ids_of(text: bytes):
    ids = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_ids_give_what_their_text_gives(backend):
    good = ids_of(GOOD.encode())
    rows = {
        "plain": (good, GOOD),
        "ended by eos": ([*good, END], GOOD),
        "only the first eos counts, and nothing behind it": (
            [*good[:4], END, *good[4:], END],
            "<think>a</think><answer>",
        ),
        "specials are silent": ([IMAGE, *good[:3], IMAGE, *good[3:], IMAGE], GOOD),
        "empty": ([], ""),
        "only eos": ([END], ""),
        "what stands behind an eos may be no id": ([*good, END, -100, *good, 1 << 40], GOOD),
        "half a character": ([good[0], 14, 15, *good[2:]], GOOD.replace(">a<", ">é<")),
    }
    width = max(len(ids) for ids, _ in rows.values()) + 2
    # Padding is never looked up: here it is no id at all.
    ids = torch.tensor([ids + [-100] * (width - len(ids)) for ids, _ in rows.values()])
    lengths = torch.tensor([len(ids) for ids, _ in rows.values()], dtype=torch.int32)
    got = grounding_rewards_from_ids(ids, lengths, table_of_pieces(), gold(len(rows)), backend=backend)
    want = grounding_rewards(*packed([text for _, text in rows.values()]), gold(len(rows)))
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert torch.equal(a, b), name
    assert got.format.tolist() == [1, 1, 0, 1, 0, 0, 1, 1]
    # Lengths below 0 and beyond the ids, also so far that a pointer moved by them wraps.
    lengths = torch.tensor([-1, -(1 << 60), -(1 << 62), -(1 << 63), 1 << 60, (1 << 63) - 1])
    got = grounding_rewards_from_ids(torch.tensor([good] * 6), lengths, table_of_pieces(), gold(6), backend=backend)
    assert got.format.tolist() == [0, 0, 0, 0, 1, 1]


def test_box_marks_are_read_in_their_format_and_silent_in_the_others():
    tokens = [b"<|box_start|>", b"(100,200),", b"(300,400)", b"<|box_end|>", b"<think>a</think><answer>", b"</answer>"]
    table = VocabularyBytes.build(tokens, [], mark_ids=[0, 3])
    ids = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [4, 0, 1, 2], [0, 1, 3, 2]])
    lengths = torch.tensor([4, 4, 4, 4])
    for kind, found in (("marked", [1, 0, 0, 0]), ("box", [1, 1, 1, 1])):
        got = grounding_rewards_from_ids(ids, lengths, table, gold(4), answer_format=kind)
        assert got.found.tolist() == got.format.tolist() == found
    answer = torch.tensor([[4, 0, 1, 2, 3, 5]])
    assert grounding_rewards_from_ids(answer, torch.tensor([6]), table, gold(1)).format == 1


def test_a_table_packs_every_token_with_its_role():
    tokens = [b"plain", b"a(b", b"x[", b"<", b"", b"</s>"]
    starts, sizes, roles = (x.tolist() for x in unpack_entries(VocabularyBytes.build(tokens, [5]).entries))
    data = VocabularyBytes.build(tokens, [5]).data.numpy().tobytes()
    assert [data[start : start + size] for start, size in zip(starts, sizes, strict=True)] == tokens
    assert roles == [PLAIN, BRACKET, BRACKET, TEXT, TEXT, EOS]


def test_longer_tokens_than_a_run_and_plain_ones_between():
    """Tokens of 1 to 5000 bytes, passed over, copied and read in place, with the answer anywhere among them."""
    for size in (1, 15, 16, 17, 255, 5000):
        tokens = [b"x" * size, b"<think>" + b"y" * size + b"</think><ans", b"wer>", BOX.encode() + b"</answer>", b"\n"]
        table = VocabularyBytes.build(tokens, [])
        for before in (0, 1, 15, 16, 17, 40):
            row = [0] * before + [1, 2, 3, 4]
            ids, lengths = torch.tensor([row, [*row[:-1], 0], row]), torch.tensor([len(row)] * 2 + [len(row) - 1])
            got = grounding_rewards_from_ids(ids, lengths, table, gold(3))
            want = grounding_rewards_from_ids(ids, lengths, table, gold(3), backend="torch")
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert got.format.tolist() == [1, 0, 1] and got.spans[0, 0] == before * size + 7


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_would_be_read_beyond_its_bounds_is_an_error(backend):
    options = {"backend": backend}
    for ids in ([99], [-1], [0, 16], [99, END], [-100, END]):
        with pytest.raises(IndexError, match="the table covers 0 to"):
            ids = torch.tensor([ids])
            grounding_rewards_from_ids(ids, torch.tensor([2]), table_of_pieces(), gold(1), **options)
    for offsets in ([0, 6], [-1, 5], [3, 1]):
        with pytest.raises(IndexError, match="offsets"):
            grounding_rewards(torch.zeros(5, dtype=torch.uint8), torch.tensor(offsets), gold(1), **options)
    for code in (5, 255):
        with pytest.raises(ValueError, match=f"answer_format holds the code {code}; codes are 0 to 4"):
            code = torch.tensor([code], dtype=torch.uint8)
            grounding_rewards(*packed([GOOD]), gold(1), answer_format=code, **options)
    foreign = VocabularyBytes(torch.zeros(3, dtype=torch.uint8), torch.tensor([7 << 3 | TEXT]))
    with pytest.raises(IndexError):
        grounding_rewards_from_ids(torch.zeros(1, 1).long(), torch.tensor([1]), foreign, gold(1), **options)


def test_what_is_refused():
    text, offsets = packed([GOOD])
    ids, lengths, table = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([3]), table_of_pieces()
    assert_refused(
        ("text is int8; it must be uint8", lambda: grounding_rewards(text.char(), offsets, gold(1))),
        (r"offsets has shape \(2,\); it must be \(3\)", lambda: grounding_rewards(text, offsets, gold(2))),
        (r"gold has shape \(4,\)", lambda: grounding_rewards(text, offsets, gold(1)[0])),
        ("gold is float64; it must be float32", lambda: grounding_rewards(text, offsets, gold(1).double())),
        ("answer_format is 'json'", lambda: grounding_rewards(text, offsets, gold(1), answer_format="json")),
        (
            "answer_format is int64; it must be uint8",
            lambda: grounding_rewards(text, offsets, gold(1), answer_format=torch.tensor([0])),
        ),
        ("is 'triton'; for grounding_rewards it", lambda: grounding_rewards(text, offsets, gold(1), backend="triton")),
        ("ids is int32", lambda: grounding_rewards_from_ids(ids.int(), lengths, table, gold(1))),
        (r"lengths has shape \(2,\)", lambda: grounding_rewards_from_ids(ids, lengths.repeat(2), table, gold(1))),
        (r"gold has shape \(2, 4\)", lambda: grounding_rewards_from_ids(ids, lengths, table, gold(2))),
        ("EOS id 7 is outside the 2 ids", lambda: VocabularyBytes.build([b"a", b"b"], [7])),
        ("mark id 2 is outside the 2 ids", lambda: VocabularyBytes.build([b"a", b"b"], [], mark_ids=[2])),
        ("a token must have less than 4 MiB", lambda: VocabularyBytes.build([b"a" * 2**22], [])),
    )
