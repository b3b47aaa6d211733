"""Examples become a family's chat: the ids Hugging Face gives, counted image tokens, and a mask on the answers."""

import json
import re

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.bench.reward_bench.vocabularies import qwen2_tokenizer
from boxgrpo.trainer.data.example import Example, Refused
from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.data.processor import Processor, resized, token_side
from boxgrpo.trainer.data.vocabulary import chat_template, demo_tokenizer
from boxgrpo.trainer.world.tiny import tiny_config
from families import family_config
from special_ids import SPECIAL_IDS

THINK = (
    " First output the thinking process in <think> </think> tags"
    " and then output the bounding box in <answer> </answer> tags."
)
ANSWER = "<think>It is left.</think><answer>(125, 250), (500, 750)</answer>"
LIMITS = {"min_pixels": 784, "max_pixels": 50_000}
QWEN3 = {"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
# The images of these tests have the same numbers of tokens, whose sides are 28 or 32 pixels.


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for name, size in (("wide", (112, 56)), ("tall", (60, 150))):
        paths.append(str(folder / f"{name}.png"))
        Image.effect_noise(size, 60).save(paths[-1])
    return tuple(paths)


@pytest.fixture(scope="module")
def demo():
    return Processor(demo_tokenizer([THINK, ANSWER, "Where is the cup?"]), Qwen2VLImageProcessorPil(), **LIMITS)


@pytest.fixture(scope="module")
def qwen2(shared):
    tokenizer = qwen2_tokenizer(shared / "data/qwen2_tokenizer/merges.txt")
    return Processor(tokenizer, Qwen2VLImageProcessorPil(), **LIMITS)


@pytest.fixture(scope="module")
def qwen3(shared):
    """Qwen3-VL's: thinking tags are tokens, and no system's turn is added."""
    tokenizer = qwen2_tokenizer(shared / "data/qwen2_tokenizer/merges.txt")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = chat_template(None)
    return Processor(tokenizer, Qwen2VLImageProcessorPil(**QWEN3), family="qwen3_vl", **LIMITS)


@pytest.fixture(params=["demo", "qwen2", "qwen3"])
def processor(request):
    return request.getfixturevalue(request.param)


def example(images, **changes):
    question = "<image>" * len(images) + "Where is the cup? "
    fields = {"id": "1", "task": "diff", "images": images, "question": question, "gold": None}
    return Example(**fields | {"source": "data.json#3"} | changes)


def chat(images, *texts, **changes):
    turns = tuple(zip(("user", "assistant") * len(texts), texts))
    return example(images, question=texts[0], turns=turns, **changes)


def spelled(processor, ids):
    """The text of ids, each image's run of pads as a number in brackets."""
    tokenizer, pad = processor.tokenizer, processor.image_token_id
    text, run = "", 0
    for i in [*ids.tolist(), None]:
        if i == pad:
            run += 1
            continue
        text, run = text + (f"[{run}]" if run else ""), 0
        text += "" if i is None else tokenizer.decode([i])
    return text


def test_prompt_is_images_question_and_instruction(processor, images):
    prompt = processor.prompt(example(images))
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert spelled(processor, prompt.input_ids) == (
        f"{'' if processor.chat_format.default_system is None else system}"
        "<|im_start|>user\n<|vision_start|>[8]<|vision_end|><|vision_start|>[10]<|vision_end|>"
        f"Where is the cup?{THINK}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "values", [{}, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}, {"do_normalize": False}]
)
def test_patches_are_the_image_processors_to_the_bit_and_give_the_images_back(demo, tmp_path, values):
    """Colours, three sizes, one of them scaled down and one up."""
    demo, paths = Processor(demo.tokenizer, Qwen2VLImageProcessorPil(**values), **LIMITS), []
    for size in ((112, 56), (400, 300), (28, 140), (20, 90)):
        noise = Image.merge("RGB", [Image.effect_noise(size, 200) for _ in range(3)])
        noise.save(path := tmp_path / f"{size[0]}.png")
        paths.append(str(path))
    prompt = demo.prompt(example(tuple(paths)))
    images = demo.images_of(prompt)
    assert [image.size for image in images[:3:2]] == [(112, 56), (28, 140)]
    assert [image.size for image in images] == [resized(Image.open(path).size, **LIMITS) for path in paths]
    assert images[0].tobytes() == Image.open(paths[0]).tobytes()
    for same in (images, [load_image(path) for path in paths]):
        expected = demo.image_processor(images=same, return_tensors="pt")
        assert torch.equal(expected["image_grid_thw"], prompt.image_grid_thw)
        assert torch.equal(expected["pixel_values"], prompt.pixel_values)
    assert demo.images_of(demo.prompt(example(()))) == []


@pytest.mark.parametrize("count", range(1, 7))
def test_patches_of_16_pixels_are_the_image_processors_to_the_bit(qwen3, tmp_path, count):
    """Up to six images of different sizes, one below a token's 32 pixels, one scaled down and one up."""
    paths = []
    for size in [(96, 64), (28, 140), (500, 300), (20, 90), (33, 31), (64, 224)][:count]:
        noise = Image.merge("RGB", [Image.effect_noise(size, 200) for _ in range(3)])
        noise.save(path := tmp_path / f"{size[0]}.png")
        paths.append(str(path))
    prompt = qwen3.prompt(example(tuple(paths)))
    images = qwen3.images_of(prompt)
    assert images[0].tobytes() == Image.open(paths[0]).tobytes()
    assert [image.size for image in images] == [resized(Image.open(path).size, side=32, **LIMITS) for path in paths]
    expected = qwen3.image_processor(images=[load_image(path) for path in paths], return_tensors="pt")
    assert torch.equal(expected["image_grid_thw"], prompt.image_grid_thw)
    assert torch.equal(expected["pixel_values"], prompt.pixel_values)
    sizes = [Image.open(path).size for path in paths]
    assert qwen3.prompt_tokens(example(tuple(paths)), sizes) == len(prompt.input_ids)


def hugging_face_ids(processor, messages, image_tokens, *, answered=True):
    """The ids of the tokenizer's chat template, one vision token of an image repeated as its processor repeats it."""
    messages = [m | {"content": in_parts(m["content"])} for m in messages]
    if not answered:
        messages = messages[: 1 + [m["role"] for m in messages].index("user")]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
    first, *rest = text.split("<|image_pad|>")
    text = first + "".join("<|image_pad|>" * n + part for n, part in zip(image_tokens, rest, strict=True))
    # The template's last newline comes after the last answer: nothing reads it, so it is not there.
    return processor.tokenizer.encode(text.removesuffix("\n") if answered else text)


def in_parts(text):
    parts = [{"type": "text", "text": part} for part in text.split("<image>")]
    return [part for text in parts for part in ({"type": "image"}, text)][1:]


SAID = ["Where is the cup?", ANSWER, " And  the 世界\n<|box_start|>(1,2),(3,4)<|box_end|>? ", "Gone.\n"]
CHATS = {
    "images first": ([f"<image><image>{SAID[0]}", *SAID[1:]], [8, 10]),
    "images first, on lines of their own": ([f"<image>\n<image>\n{SAID[0]}", *SAID[1:]], [8, 10]),
    "between words": (["Compare <image> with the first. <image> Where is the cup?", ANSWER], [8, 10]),
    "of the second question": ([f"<image>{SAID[0]}", ANSWER, "And\n\n<image>in this one? <image>", "Yes."], [8, 10, 8]),
    "only in the second question": (["\n\n Hello ", "Hi.", "<image>", "A cup."], [8]),
}


@pytest.mark.parametrize("system", [None, "", "Answer in pixels.", "\n You  see <image>. "])
@pytest.mark.parametrize("name", CHATS)
def test_case_05_case_09_and_case_10_ids_are_those_of_the_chat_template(processor, images, name, system):
    """Images stand where their marks do, in every turn, and the system's text is the record's."""
    texts, image_tokens = CHATS[name]
    images, first_tokens = [*images, images[0]][: len(image_tokens)], image_tokens
    if "<image>" in (system or ""):
        images, image_tokens = [images[0], *images], [8, *image_tokens]
    messages = [{"role": "system", "content": system}] * (system is not None)
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    one = chat(tuple(images), *texts, system=system)
    conversation, prompt = processor.conversation(one), processor.prompt(one)
    assert conversation.input_ids.tolist() == hugging_face_ids(processor, messages, image_tokens)
    shown = len(image_tokens) - len(first_tokens) + texts[0].count("<image>")
    assert prompt.input_ids.tolist() == hugging_face_ids(processor, messages, image_tokens[:shown], answered=False)
    assert len(prompt.image_grid_thw) == shown and len(conversation.image_grid_thw) == len(images)
    length = len(prompt.input_ids)
    assert torch.equal(prompt.input_ids, conversation.input_ids[:length])
    assert torch.equal(prompt.position_ids, conversation.position_ids[:, :length])


def test_case_04_without_marks_all_images_stand_first(demo, images):
    marked, plain = chat(images, f"<image><image>{SAID[0]}", ANSWER), chat(images, SAID[0], ANSWER)
    assert torch.equal(demo.conversation(marked).input_ids, demo.conversation(plain).input_ids)
    # A question without a chat may hold marks too; the words that are added to it stand behind those it begins with.
    asked = {"gold": (1, 2, 3, 4), "answer_format": "box"}
    for question, user in {
        "<image>\n <image> Where? ": "[8][10]This is a single image grounding task with simple reference. Where?",
        "In <image>, not <image>": "This is a single image grounding task with simple reference. In [8], not [10]",
    }.items():
        text = spelled(demo, demo.prompt(example(images, question=question, **asked)).input_ids)
        for mark in ("<|vision_start|>", "<|vision_end|>"):
            text = text.replace(mark, "")
        assert f"user\n{user}<|im_end|>" in text


def test_an_answer_begins_where_a_completion_does(demo, images):
    """Its own first newline is not merged with that of the header, which a rollout's prompt ends with."""
    one = chat(images, SAID[0], "\nHere.")
    conversation = demo.conversation(one)
    learned = conversation.input_ids[conversation.loss_mask]
    assert demo.tokenizer.decode(learned) == "\nHere.<|im_end|>"
    assert torch.equal(demo.prompt(one).input_ids, conversation.input_ids[: -len(learned)])


@pytest.mark.parametrize(
    ("texts", "system", "reason"),
    [
        (["<image><image><image>Where?", "There."], None, "marks <image>: 3, images: 2"),
        (["<image>Where?", "There."], None, "marks <image>: 1, images: 2"),
        (["<image>Where?", "There.", "<image>?", "No."], "<image>", "marks <image>: 3, images: 2"),
        (["<image>Where?", "In <image>."], None, "an answer holds <image>"),
    ],
)
def test_case_04_and_case_05_marks_are_as_many_as_images_and_in_no_answer(images, texts, system, reason):
    with pytest.raises(Refused, match=reason):
        chat(images, *texts, system=system)


def test_a_conversation_is_its_prompt_and_learned_answers(processor, images):
    chatted = chat(images, f"Where is the cup?{THINK}", ANSWER, "Sure?", "Yes.")
    prompt, conversation = processor.prompt(chatted), processor.conversation(chatted)
    length = len(prompt.input_ids)
    assert torch.equal(prompt.input_ids, conversation.input_ids[:length])
    assert torch.equal(prompt.position_ids, conversation.position_ids[:, :length])
    assert torch.equal(prompt.pixel_values, conversation.pixel_values)
    # The same question as a stage-2 record asks in the same words.
    assert torch.equal(prompt.input_ids, processor.prompt(example(images)).input_ids)
    mask = conversation.loss_mask
    assert mask.shape == conversation.input_ids.shape and mask.nonzero()[0] == length
    assert processor.tokenizer.decode(conversation.input_ids[mask]) == f"{ANSWER}<|im_end|>Yes.<|im_end|>"


def test_a_prompt_over_the_budget_is_refused_with_both_numbers(images, demo):
    tokens = len(demo.prompt(example(images)).input_ids)
    limits = LIMITS | {"max_prompt_tokens": tokens - 1}
    tight = Processor(demo.tokenizer, Qwen2VLImageProcessorPil(), **limits)
    message = (
        rf"data\.json#3: {tokens} tokens, 18 of them for 2 images, are over the budget of {tokens - 1}.*max_prompt"
    )
    with pytest.raises(ValueError, match=message):
        tight.prompt(example(images))
    with pytest.raises(ValueError, match="over the budget.*Raise --cutoff_len, or lower --max_pixels"):
        tight.conversation(chat(images, THINK, ANSWER))
    tight.max_prompt_tokens = tokens
    tight.prompt(example(images))


def test_questions_may_hold_box_marks_but_no_marks_of_turns_or_images(demo, images):
    marked = example(
        images, question="The <|object_ref_start|>cup<|object_ref_end|> at <|box_start|>(1,2),(3,4)<|box_end|>?"
    )
    assert demo.tokenizer.convert_tokens_to_ids("<|box_start|>") in demo.prompt(marked).input_ids.tolist()
    for mark in ("<|image_pad|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>"):
        with pytest.raises(ValueError, match=rf"data\.json#3: the user's text holds {mark}".replace("|", r"\|")):
            demo.prompt(example(images, question=f"Where {mark}?"))


def test_decode_keeps_box_marks_and_drops_the_end(demo):
    assert demo.tokenizer.convert_ids_to_tokens(demo.eos_ids) == ["<|im_end|>", "<|endoftext|>"]
    text = "<|box_start|>(1,2)<|box_end|>"
    assert demo.decode(demo.tokenizer.encode(f"{text}<|im_end|><|endoftext|><|endoftext|>")) == text
    assert demo.decode(torch.tensor(demo.tokenizer.encode(ANSWER))) == ANSWER


def test_saved_folders_load_here_and_in_hugging_face(demo, images, tmp_path):
    demo.save_pretrained(tmp_path)
    tiny_config(500, SPECIAL_IDS).save_pretrained(tmp_path)
    loaded = Processor.from_pretrained(tmp_path, **LIMITS)
    before, after = demo.prompt(example(images)), loaded.prompt(example(images))
    assert torch.equal(before.input_ids, after.input_ids) and torch.equal(before.pixel_values, after.pixel_values)
    # The name that every version of transformers has, with or without torchvision.
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"]
        == "Qwen2VLImageProcessor"
    )
    smaller = Processor.from_pretrained(tmp_path, min_pixels=784, max_pixels=3136)
    assert smaller.prompt(example(images)).image_grid_thw.prod(1).max() <= 3136 // 14**2


def test_a_saved_qwen3_vl_is_loaded_as_one(qwen3, images, tmp_path):
    qwen3.save_pretrained(tmp_path)
    family_config("qwen3_vl").save_pretrained(tmp_path)
    before, after = (p.prompt(example(images)) for p in (qwen3, Processor.from_pretrained(tmp_path, **LIMITS)))
    assert token_side(tmp_path) == 32
    assert torch.equal(before.input_ids, after.input_ids) and torch.equal(before.pixel_values, after.pixel_values)


@pytest.mark.parametrize("place", ["tokenizer", "chat_template.json"])
def test_a_thinking_checkpoint_is_refused_by_its_template(qwen3, tmp_path, place):
    template = chat_template(None).replace("assistant\n' }}", "assistant\n<think>\n' }}")
    qwen3.save_pretrained(tmp_path)
    family_config("qwen3_vl").save_pretrained(tmp_path)
    if place == "tokenizer":
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / place).write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match=r"ends a question with '.*<think>.n'.* Thinking checkpoints cannot be"):
        Processor.from_pretrained(tmp_path, **LIMITS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen2_5_vl", "is a Qwen2.5-VL; boxes in resized_pixels cannot be trained. Use a Qwen2-VL or Qwen3-VL."),
        ("qwen3_vl", "preprocessor_config.json has patch_size 14; this Qwen3-VL has 16. Copy it again"),
    ],
)
def test_what_does_not_fit_the_family_is_refused_by_name(demo, tmp_path, kind, message):
    demo.save_pretrained(tmp_path)
    family_config(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        Processor.from_pretrained(tmp_path, **LIMITS)


@pytest.mark.parametrize(("values", "family", "side"), [({}, "qwen2_vl", 28), (QWEN3, "qwen3_vl", 32)])
def test_without_limits_an_image_has_4_to_512_tokens(demo, tmp_path, values, family, side):
    p = Processor(demo.tokenizer, Qwen2VLImageProcessorPil(**values), family=family)
    for size, tokens in (((side, side), 4), ((32 * side, 20 * side), 28 * 17)):
        Image.new("RGB", size).save(tmp_path / "image.png")
        prompt = p.prompt(example((str(tmp_path / "image.png"),)))
        assert (prompt.input_ids == p.image_token_id).sum() == tokens
        ((_, height, width),) = (prompt.image_grid_thw * side // 2).tolist()
        assert resized(size, 0, 0, side) == (width, height)


def test_pixel_limits_and_tokens_are_checked(demo):
    with pytest.raises(ValueError, match="min_pixels is 9 and max_pixels 4"):
        Processor(demo.tokenizer, Qwen2VLImageProcessorPil(), min_pixels=9, max_pixels=4)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|endoftext\|>"):
        Processor(plain, Qwen2VLImageProcessorPil(), **LIMITS)


def test_without_thinking_the_box_alone_is_learned(demo, images):
    """RefCOCO in SFT: the question as GRPO asks it, and the gold box as its answer."""
    one = example(images, answer_format="box", gold=(125.4, 250.0, 500.0, 749.6), question="Where is the cup?")
    learned, prompt = demo.conversation(one), demo.prompt(one).input_ids
    assert demo.tokenizer.decode(learned.input_ids[learned.loss_mask]) == "(125, 250), (500, 750)<|im_end|>"
    assert torch.equal(prompt, learned.input_ids[: len(prompt)])
    text = spelled(demo, prompt)
    assert "This is a single image grounding task with simple reference. Where is the cup?<|im_end|>" in text
    assert "think" not in text
    with pytest.raises(ValueError, match=r"data\.json#3: the record has no answer to train on"):
        demo.conversation(example(images, gold=(1, 2, 3, 4)))
