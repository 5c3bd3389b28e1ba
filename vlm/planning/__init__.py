"""What a stage will cost before anything is downloaded or built: tokens, parameters, FLOPs, memory, hours."""
