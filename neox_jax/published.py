"""What others have published of these models' scores, to be set beside one's own.

20B: its model card on the Hugging Face hub (zero-shot), and the Open LLM Leaderboard's first version (shots as there).
Pythia: EleutherAI's own evaluations of the last step, zero-shot.
"""

CARD = "model card, huggingface.co/EleutherAI/gpt-neox-20b"
LEADERBOARD = "Open LLM Leaderboard, first version"
PYTHIA = "EleutherAI, for the last step"

_PYTHIA_TASKS = ("lambada_openai", "piqa", "arc_easy", "sciq")
_PYTHIA = {
    "pythia-70m": (0.185, 0.595, 0.374, 0.601),
    "pythia-160m": (0.328, 0.627, 0.435, 0.741),
    "pythia-410m": (0.516, 0.668, 0.521, 0.811),
    "pythia-1b": (0.562, 0.707, 0.569, 0.840),
    "pythia-1.4b": (0.616, 0.709, 0.607, 0.865),
    "pythia-2.8b": (0.647, 0.739, 0.644, 0.882),
    "pythia-6.9b": (0.673, 0.752, 0.673, 0.897),
    "pythia-12b": (0.705, 0.760, 0.702, 0.902),
}
# model -> [(task, metric, shots, value, source)]
PUBLISHED: dict[str, list[tuple[str, str, int, float, str]]] = {
    "gpt-neox-20b": [
        ("lambada_openai", "acc", 0, 0.720, CARD),
        ("sciq", "acc", 0, 0.928, CARD),
        ("piqa", "acc", 0, 0.779, CARD),
        ("triviaqa", "exact_match", 0, 0.259, CARD),
        ("arc_challenge", "acc", 0, 0.380, CARD),
        ("arc_challenge", "acc_norm", 25, 0.4573, LEADERBOARD),
        ("hellaswag", "acc_norm", 10, 0.7345, LEADERBOARD),
        ("mmlu", "acc", 5, 0.250, LEADERBOARD),
        ("truthfulqa_mc2", "acc", 0, 0.3161, LEADERBOARD),
        ("winogrande", "acc", 5, 0.689, LEADERBOARD),
        ("gsm8k", "exact_match", 5, 0.0243, LEADERBOARD),
        ("drop", "f1", 3, 0.0504, LEADERBOARD),
    ],
    **{
        model: [(task, "acc", 0, value, PYTHIA) for task, value in zip(_PYTHIA_TASKS, values, strict=True)]
        for model, values in _PYTHIA.items()
    },
}
