"""From the draws of an optimizer step to the packs of a rank."""
