"""What the UniVG-R1 paper (Bai et al. 2025) prints, row by row: Acc@0.5 in %, the last number of a row its average.

The average is the paper's own, also where the row's numbers have another mean (UniVG-R1 on MIG-Bench: 72.62).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A published table."""

    name: str  # "Table 1"
    columns: tuple[str, ...]  # without the model and the average
    rows: dict[str, tuple[float, ...]]  # by model: a number for each column, then the average


MIG_COLUMNS = ("Static", "Robust", "Common", "OT", "MV", "Region", "Refer", "GG", "Reason", "Co-Re")

MIG = Table(
    "Table 1",
    MIG_COLUMNS,
    {
        "Qwen2-VL-72B": (51.13, 43.61, 73.74, 24.54, 32.63, 19.86, 37.37, 67.83, 50.51, 17.94, 41.91),
        "Mantis": (1.52, 0.00, 3.31, 12.18, 2.08, 1.00, 1.01, 10.02, 0.00, 0.85, 3.20),
        "LLaVA-OV-7B": (6.06, 3.19, 3.43, 0.18, 1.04, 1.08, 9.09, 15.43, 6.93, 0.85, 4.73),
        "Minicpm2.6": (14.58, 2.13, 14.34, 9.82, 6.25, 1.75, 11.11, 10.02, 2.97, 2.56, 7.55),
        "mPLUG-Owl3": (18.56, 6.38, 34.93, 8.55, 7.64, 2.41, 7.07, 22.85, 9.09, 5.98, 12.35),
        "InternVL2-8B": (8.52, 19.15, 38.40, 19.82, 10.07, 5.24, 34.34, 39.79, 26.80, 7.69, 20.98),
        "Qwen2-VL-7B": (29.92, 36.17, 43.07, 14.55, 9.38, 15.54, 29.29, 63.51, 44.33, 16.24, 30.20),
        "Migician": (70.64, 45.74, 72.76, 67.82, 60.07, 72.57, 75.76, 84.12, 52.58, 33.33, 63.54),
        "UniVG-R1": (71.97, 58.51, 93.13, 76.36, 66.32, 81.71, 82.83, 88.04, 62.89, 44.44, 72.64),
    },
)

MIG_2B = Table(
    "Table 6",
    MIG_COLUMNS,
    {
        "Qwen2-VL-2B": (15.34, 17.02, 27.98, 13.45, 7.29, 7.32, 19.19, 57.53, 6.19, 14.53, 18.58),
        "2B, CoT-SFT (90k)": (29.36, 31.91, 62.09, 34.55, 23.96, 38.40, 65.66, 74.23, 26.80, 23.93, 41.09),
        "2B, GRPO (10k)": (47.92, 46.81, 85.64, 57.09, 44.10, 59.43, 75.76, 81.03, 42.23, 25.64, 56.57),
        "2B, GRPO-Difficulty (10k)": (50.57, 43.62, 88.34, 57.09, 50.69, 60.27, 72.73, 82.06, 44.33, 29.91, 57.96),
    },
)

REASONING = Table(
    "Table 2",
    ("LISA (val)", "LISA (test)", "LLMSeg", "ReasonVOS", "ReVOS"),
    {
        "Qwen2-VL-7B": (52.00, 49.17, 35.53, 9.83, 23.55, 34.02),
        "Migician": (36.00, 32.09, 34.68, 33.41, 39.70, 35.18),
        "UniVG-R1": (64.00, 59.69, 50.60, 58.73, 60.03, 58.61),
    },
)

REFCOCO = Table(
    "Table 3",
    (
        *("RefCOCO val", "RefCOCO testA", "RefCOCO testB"),
        *("RefCOCO+ val", "RefCOCO+ testA", "RefCOCO+ testB"),
        *("RefCOCOg val", "RefCOCOg test"),
    ),
    {
        "VisionLLM v2": (79.20, 82.30, 77.00, 68.90, 75.80, 61.80, 73.30, 74.80, 74.14),
        "Shikra": (87.00, 90.60, 80.20, 81.60, 87.40, 72.10, 82.30, 82.20, 82.97),
        "InternVL2-8B": (87.10, 91.10, 80.70, 79.80, 87.90, 71.40, 82.70, 82.70, 82.94),
        "GroundingGPT": (88.02, 91.55, 82.47, 81.61, 87.18, 73.18, 81.67, 81.99, 83.57),
        "Griffon v2": (89.60, 91.80, 86.50, 81.90, 85.50, 76.20, 85.00, 86.00, 85.30),
        "GroundingDINO-L": (90.60, 93.20, 88.20, 82.80, 89.00, 75.90, 86.10, 87.00, 86.60),
        "Qwen2-VL-7B": (91.70, 93.60, 87.30, 85.80, 90.50, 79.50, 87.30, 87.80, 87.96),
        "Migician": (91.62, 93.49, 87.22, 86.13, 91.06, 79.93, 88.06, 87.80, 88.16),
        "UniVG-R1": (91.64, 93.11, 87.16, 85.91, 90.53, 80.04, 88.67, 88.56, 88.20),
    },
)
