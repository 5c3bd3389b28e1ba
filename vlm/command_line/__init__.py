"""What the command line is made of besides LightningCLI itself, which `cli.py` composes."""
