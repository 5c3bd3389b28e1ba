"""`vlm run compose`: an illustrated article of a title, as InternLM-XComposer writes it.

    title -> article -> lines that want an image -> a caption for each -> candidates from an index -> choice of A to D
                                                                              everything said, on the disk -> page

`docs/systems/xcomposer.md` has the command.
"""

from vlm.procedures.compose.command import main

__all__ = ["main"]
