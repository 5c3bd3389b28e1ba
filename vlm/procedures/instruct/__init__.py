"""`vlm run instruct`: instruction data written by a model, as LLaVA, LLaVA-NeXT, MiniGPT-4 and Mini-Gemini made theirs.

    records -> kinds (prompts) -> procedure -> models (endpoint, local) -> answers (rules) -> engine -> LLaVA's JSON
                                                                    ledger: everything that was said, on the disk

`docs/instruction_generation.md` has the kinds and commands. Nothing here imports torch before a local model is opened.
"""

from vlm.procedures.instruct.command import main

__all__ = ["main"]
