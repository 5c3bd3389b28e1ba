"""What libraries need not say."""

import logging
import warnings


def silence() -> None:
    """What libraries say that our own banner and checks say, or that is meant that way."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",
        "Found .* module.s. in eval mode",
        "Total length of .list. across ranks is zero",
        ".*LeafSpec",
        ".*smaller than the logging interval",  # `LogCadence` sees to it
        "You have overridden .on_before_batch_transfer.",  # `FeatureCache` does
    ):
        warnings.filterwarnings("ignore", message)
    # a kernel for weights in 4 bits on some CPUs, which would come from the hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda said: "gemm_4bit_forward" not in str(said.msg))
