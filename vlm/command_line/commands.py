"""Which commands there are."""

from collections.abc import Sequence

USAGE = """usage: vlm COMMAND ...

  fit --recipe SYSTEM [--demo]     train every stage of a published recipe, one process each; continues where it stopped
  fit -c FILE [-c FILE ...]        train one stage
  validate | test -c FILE ... --weights ARTEFACT
  predict -c FILE ... --weights ARTEFACT
                                   answers to data.predict_sources in one file, on any number of devices
  scores NAME=FOLDER ...           what several evaluations found, side by side
  predict --weights ARTEFACT --image FILE|FOLDER ... --prompt TEXT | --questions FILE [--out FILE] [--pictures FOLDER]
  check-data -c FILE ...           look at every sample before a run does; a report, and a list of the bad ones
  show-data -c FILE ...            what is trained on: pictures as the system sees them, tokens and labels
  plan -c FILE ... | --recipe NAME what a stage takes, before anything is downloaded: tokens, memory, FLOPs, hours
  systems                          the systems and their stages
  demo-data FOLDER                 write the embedded data
  convert SRC DST --system NAME --to LAYOUT
  run PROCEDURE ...                make data as the papers do; `vlm run` lists the procedures
  export SRC DST                   a finished stage as a folder for the Hugging Face tools

`vlm fit --help` lists every option of a stage."""

TOOLS = {
    "check-data": "vlm.commands.check_data.command:main",
    "convert": "vlm.commands.convert:main",
    "demo-data": "vlm.demo:main",
    "export": "vlm.commands.export:main",
    "plan": "vlm.commands.plan:main",
    "predict": "vlm.commands.predict:main",
    "run": "vlm.recipes.node:main",
    "scores": "vlm.evaluation.scores:main",
    "show-data": "vlm.commands.show_data:main",
    "systems": "vlm.recipes.catalogue:print_systems",
}
"""Commands that need no trainer: the function that runs each, imported when it is asked for."""

TAKE_STAGES = ("check-data", "plan", "show-data")
"""The tools that look at a stage: they take the options of `vlm fit`, and who turns these into a `StageView`."""

STAGE_COMMANDS = ("fit", "validate", "test", "predict")
"""Commands of the trainer on one stage."""


OPTIONS = (
    *("seed_everything", "weights", "config", "print_config"),
    *("ckpt_path", "weights_only", "verbose", "return_predictions"),
)
"""What else stands at the top of a configuration, beside model, data, trainer and the callbacks of every stage."""

HELP = {
    "prog": "vlm",
    "usage": "vlm fit | validate | test | predict  -c FILE [-c FILE ...] [--KEY VALUE ...]",
    "epilog": "A class is named by its last name or whole path, and tells its own options: --data.help InstructionData,"
    " --data.init_args.sources.help LlavaJson, --model.help LLaVA15, --trainer.callbacks.help EarlyStopping. Later"
    " files and options come over earlier ones. --print_config prints all of it, as a file that -c takes.",
}
"""What the help of the stage commands says besides its options."""


def is_stage_command(command: str, options: Sequence[str]) -> bool:
    """Whether the trainer runs it: `predict` is quick about some images, unless it is asked about a stage's data."""
    names = [option.split("=")[0] for option in options]
    asked = any(
        name in ("-c", "--config", "--data", "--print_config") or "." in name.lstrip("-.")
        for name in names
        if name.startswith("-")
    )
    return command in STAGE_COMMANDS and (command != "predict" or asked)
