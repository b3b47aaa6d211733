"""The model families by the model_type of their config.json. Nothing else asks which family a model is of."""

from .qwen2_vl import Qwen2VL

FAMILIES = {"qwen2_vl": Qwen2VL}


def make_model(config) -> Qwen2VL:
    """A model of the config's family, whose weights are not set."""
    return FAMILIES[config.model_type](config)
