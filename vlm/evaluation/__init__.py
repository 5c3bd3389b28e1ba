"""What a system is worth: judges, scores, and forms in which benchmarks take answers."""

from importlib import import_module

_HOMES = {
    "LlavaReview": "submissions",
    "MathVistaExtraction": "submissions",
    "MMBenchSheet": "submissions",
    "MMVetGrader": "submissions",
    "Retrieval": "retrieval",
    "VQAServer": "submissions",
    "VizWizServer": "submissions",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:  # on first use: `vlm scores` needs no torch
        return getattr(import_module(f"vlm.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vlm.evaluation' has no attribute {name!r}")
