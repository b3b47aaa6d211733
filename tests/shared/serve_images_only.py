"""`transformers` as a command, with a Qwen2-VL processor that has no part for videos.

The library's own has one, which cannot be built without torchvision (ARCHITECTURE.md, Traps). So its `serve` does not
start there. All else is the command as it is: `python serve_images_only.py serve FOLDER --port 8000`.
"""

from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLProcessor
from transformers.cli.transformers import main


class ImagesOnly(Qwen2VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


if __name__ == "__main__":
    AutoProcessor.register(Qwen2VLConfig, ImagesOnly, exist_ok=True)
    main()
