"""The Qwen2 tokenizer has Qwen2's ids; the demo's spends one token on each piece of an answer."""

import pytest
from transformers import AutoTokenizer

from boxgrpo.bench.reward_bench.vocabularies import qwen2_tokenizer
from boxgrpo.trainer.data import vocabulary
from boxgrpo.trainer.data.vocabulary import BOX_MARKS, SPECIAL_TOKENS, demo_tokenizer, token_bytes

MIXED = "Où est 这只猫 🦊?\n\n  (125, 250)\t½ ﬁ\u0000"
COMPLETION = "<think>The red circle is at the top left.</think><answer>(125, 250), (500, 750)</answer>"


@pytest.fixture(scope="module")
def qwen2(shared):
    return qwen2_tokenizer(shared / "data/qwen2_tokenizer/merges.txt")


@pytest.fixture(scope="module")
def demo():
    return demo_tokenizer([COMPLETION, "Find it in image 2."])


@pytest.fixture(scope="module", params=["qwen2", "demo"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_qwen2_ids_are_the_published_ones(qwen2):
    assert len(qwen2) == 151657
    assert qwen2.encode("<|im_start|>") == [151644]
    assert qwen2.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(151643, 151657))
    assert qwen2.encode("Hello world") == [9707, 1879]
    assert qwen2.encode("2024") == [17, 15, 17, 19]  # a digit is a token
    assert qwen2.encode("<|image_pad|><|vision_end|>") == [151655, 151653]


def test_loads_back_through_autotokenizer_beside_a_qwen2_vl_config(tokenizer, tmp_path):
    # With that config AutoTokenizer prefers Qwen2's class, whose own rules would split the demo's numbers into digits.
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.encode(COMPLETION + MIXED + "<|im_end|>") == tokenizer.encode(COMPLETION + MIXED + "<|im_end|>")
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.decode(loaded.encode(MIXED), clean_up_tokenization_spaces=False) == MIXED


def test_the_chat_template_takes_a_system_message_and_plain_texts(tokenizer):
    """What else it gives is compared with the processor's own ids."""
    messages = [{"role": role, "content": f"{role}'s."} for role in ("system", "user", "assistant")]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nsystem's.<|im_end|>\n<|im_start|>user\nuser's.<|im_end|>\n"
        "<|im_start|>assistant\nassistant's.<|im_end|>\n"
    )


def test_a_demo_completion_is_one_token_a_piece(demo):
    pieces = [demo.decode([i]) for i in demo.encode(COMPLETION)]
    words = [f" {word}" for word in "red circle is at the top left".split()]
    box = [".</think><answer>(", "125", ", ", "250", "), (", "500", ", ", "750", ")</answer>"]
    assert pieces == ["<think>", "The", *words, *box]
    assert demo.decode(demo.encode(" image 2")[-1:]) == " 2"


def test_demo_vocabulary_keeps_the_most_frequent_pieces_and_ends_in_the_special_tokens():
    tokenizer = demo_tokenizer(["cat cat cat dog dog emu"], vocab_size=256 + 2 + len(SPECIAL_TOKENS))
    assert len(tokenizer.encode(" cat dog")) == 2
    assert tokenizer.encode(" emu") == [*tokenizer.encode(" "), *tokenizer.encode("emu")]  # bytes: no room for it
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(258, 272))
    assert len(demo_tokenizer(["cat"], vocab_size=4096)) == 256 + 1 + len(SPECIAL_TOKENS)


def test_token_bytes_spell_the_text(tokenizer):
    table = token_bytes(tokenizer, len(tokenizer))
    assert len(table) == len(tokenizer)
    assert b"".join(table[i] for i in tokenizer.encode(COMPLETION + MIXED)).decode() == COMPLETION + MIXED
    for name, i in zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True):
        assert table[i] == (name.encode() if name in BOX_MARKS else b"")
    assert [tokenizer.convert_ids_to_tokens(i) for i in vocabulary.box_mark_ids(tokenizer)] == list(BOX_MARKS)
    assert all(table[i] for i in range(len(table) - len(SPECIAL_TOKENS)))
    assert token_bytes(tokenizer, len(table) + 3) == table + [b""] * 3
    other = demo_tokenizer(["cat"])
    other.add_tokens(["<höhe>"])  # stands for its own text, not for byte-level characters
    assert token_bytes(other, len(other))[other.encode("<höhe>")[0]].decode() == "<höhe>"


def test_foreign_merges_are_refused(tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match=r"merges\.txt holds 1 lines .* 151387"):
        qwen2_tokenizer(tmp_path / "merges.txt")
