"""Which commands there are."""

USAGE = """usage: vlm COMMAND ...

  fit --recipe SYSTEM [--demo]     train every stage of a published recipe, one process each; continues where it stopped
  fit -c FILE [-c FILE ...]        train one stage
  validate | test -c FILE ... --weights ARTEFACT
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

STAGE_COMMANDS = ("fit", "validate", "test")
"""Commands of the trainer on one stage."""
