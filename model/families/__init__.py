"""The model families by the model_type of their config.json. Nothing else asks which family a model is of."""

from .qwen2_5_vl import Qwen25VL
from .qwen2_vl import Qwen2VL
from .qwen3_vl import Qwen3VL

FAMILIES = {"qwen2_vl": Qwen2VL, "qwen2_5_vl": Qwen25VL, "qwen3_vl": Qwen3VL}
# Families that people may expect here, and why they are refused.
REFUSED = {"qwen3_vl_moe": "mixtures of experts (Qwen3-VL 30B-A3B and 235B-A22B) are not implemented"}


def family_of(config) -> type[Qwen2VL]:
    """The model class of a config."""
    return FAMILIES[config.model_type]


def make_model(config) -> Qwen2VL:
    """A model of the config's family, whose weights are not set."""
    return family_of(config)(config)
