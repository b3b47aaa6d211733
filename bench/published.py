"""The paper's ablation: Acc@0.5 of Qwen2-VL-7B on the revised MIG-Bench, UniVG-R1's Tables 4 and 5.

Left out: Table 4's row 3, CoT-SFT on as little data as row 2, and Table 6, the 2B.
"""

COLUMNS = {  # MIG-Bench's task: the paper's column, in its order
    "diff": "Static",
    "view_diff": "Robust",
    "common_object": "Common",
    "object_tracking": "OT",
    "multi_view": "MV",
    "region": "Region",
    "refer_grounding": "Refer",
    "group_grounding": "GG",
    "reasoning": "Reason",
    "correspondence": "Co-Re",
}

ABLATION = {  # our recipe: Table 4's row, else Table 5; %, in the order of COLUMNS; the average as printed
    "base": ("1", (29.92, 36.17, 43.07, 14.55, 9.38, 15.54, 29.29, 63.51, 44.33, 16.24), 30.20),
    "pure_rl": ("2", (46.02, 59.47, 88.59, 57.09, 48.96, 26.77, 78.79, 84.95, 54.64, 29.06), 57.43),
    "sft": ("4", (73.48, 45.74, 89.69, 71.27, 62.85, 86.62, 77.78, 84.74, 49.48, 31.62), 67.30),
    "cot_sft": ("5", (68.75, 48.94, 90.55, 74.55, 61.46, 80.88, 78.79, 83.30, 60.82, 41.89), 69.00),
    "continued_cot_sft": ("6", (70.64, 52.13, 89.69, 75.45, 60.42, 76.64, 78.79, 83.30, 58.76, 41.88), 68.77),
    "grpo": ("7", (71.59, 53.19, 93.01, 77.09, 64.24, 80.96, 81.82, 86.19, 55.67, 42.74), 70.65),
    "grpo_log": ("T5", (72.92, 54.26, 92.64, 76.91, 64.93, 81.55, 83.84, 87.01, 59.79, 41.88), 71.57),
    "grpo_power": ("T5", (72.73, 53.19, 93.12, 76.36, 67.71, 81.55, 81.82, 85.57, 60.82, 42.74), 71.56),
    "grpo_exp": ("8", (71.97, 58.51, 93.13, 76.36, 66.32, 81.71, 82.83, 88.04, 62.89, 44.44), 72.64),
}
