"""Examples become Qwen2-VL's chat: the ids Hugging Face gives, counted image tokens, and a mask on the answers."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.bench.reward_bench.vocabularies import qwen2_tokenizer
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.data.processor import Processor, resized
from boxgrpo.trainer.data.vocabulary import demo_tokenizer

THINK = (
    " First output the thinking process in <think> </think> tags"
    " and then output the bounding box in <answer> </answer> tags."
)
ANSWER = "<think>It is left.</think><answer>(125, 250), (500, 750)</answer>"
LIMITS = {"min_pixels": 784, "max_pixels": 50_000}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for name, size in (("wide", (112, 56)), ("tall", (60, 140))):
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


@pytest.fixture(params=["demo", "qwen2"])
def processor(request):
    return request.getfixturevalue(request.param)


def example(images, **changes):
    fields = {"id": "1", "task": "diff", "images": images, "question": "<image><image>Where is the cup? ", "gold": None}
    return Example(**fields | {"source": "data.json#3"} | changes)


def chat(images, *texts):
    turns = tuple(zip(("user", "assistant") * len(texts), texts))
    return example(images, question=texts[0], turns=turns)


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
    assert spelled(processor, prompt.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
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


def test_ids_are_those_of_the_chat_template(processor, images):
    """The pieces encoded one by one are what Hugging Face makes of the whole text."""
    turns = ["Where is the cup?", ANSWER, " And  the 世界\n<|box_start|>(1,2),(3,4)<|box_end|>?", "Gone."]
    conversation = processor.conversation(chat(images, *turns))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": turns[0]}]
    messages = [{"role": "user", "content": content}]
    messages += [{"role": r, "content": t.strip()} for r, t in zip(("assistant", "user", "assistant"), turns[1:])]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    first, second, rest = text.split("<|image_pad|>")
    text = first + "<|image_pad|>" * 8 + second + "<|image_pad|>" * 10 + rest
    # The template's last newline comes after the last answer: nothing reads it, so it is not there.
    assert conversation.input_ids.tolist() == processor.tokenizer.encode(text.removesuffix("\n"))


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
        rf"data\.json#3: {tokens} tokens, 18 of them for 2 images, are over the budget of {tokens - 1}.*--max_pixels"
    )
    with pytest.raises(ValueError, match=message):
        tight.prompt(example(images))
    with pytest.raises(ValueError, match="over the budget"):
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
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
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
