"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

NUMERICS, CALIBRATION, RUNNING, OUTPUT = "Numerics", "Calibration", "Running", "Output"


def option(help: str, panel: str, *names: str, **kwargs: Any) -> Any:
    """An option with its help, in a panel of the help page."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


Model = Annotated[str, typer.Argument(help="A transformers model folder, or a name on the hub.")]

AsJson = Annotated[bool, option("The result as JSON, and nothing else.", OUTPUT, "--json")]
Quiet = Annotated[bool, option("No progress, no notes: results and warnings.", OUTPUT, "--quiet")]

Source = Annotated[
    str | None,
    option(
        "A .txt, .md, .jsonl or .parquet file, a folder of them, or a data set on the hub.",
        CALIBRATION,
        "--calibration",
    ),
]
Samples = Annotated[int | None, option("Samples to calibrate on; 256.", CALIBRATION)]
Length = Annotated[
    int | None, option("Tokens in a sample; 2048 or the model's maximum.", CALIBRATION)
]
Packing = Annotated[
    str | None,
    option("packed: documents joined and cut; padded: one in each sample.", CALIBRATION),
]
HeldOut = Annotated[int | None, option("Samples that quality is measured on; 32.", CALIBRATION)]
Seed = Annotated[int | None, option("Of the choice of documents; 0.", CALIBRATION)]
TextColumn = Annotated[str | None, option("Where the text is in each row.", CALIBRATION)]
FewSamples = Annotated[
    bool | None, option("Permit fewer than 128 samples.", CALIBRATION, "--allow-few-samples")
]
Device = Annotated[str | None, option("Such as cpu or cuda:0.", RUNNING)]
Precision = Annotated[str | None, option("Of calibration: float32, bfloat16 or auto.", RUNNING)]
HiddenStates = Annotated[
    str | None, option("Where they wait between two blocks: cpu or disk.", RUNNING)
]
BatchTokens = Annotated[int | None, option("Tokens that run together; 4096.", RUNNING)]
RemoteCode = Annotated[bool | None, option("Run code in the model's folder.", RUNNING)]
