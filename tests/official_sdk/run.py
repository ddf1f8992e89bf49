"""`make conformance`: every version of the official SDK against our server, and what came out.

Prints a line per feature and version as it goes, writes docs/compatibility.md, and ends with 1 if
anything fails. With arguments (`0.38.0 forward`) it runs only these versions and features whose
names hold these words, and writes nothing.
"""

from __future__ import annotations

import re
import sys

from tests.official_sdk import page, port, sdk

MARKS = {"works": "yes", "absent": "-", "refused": "refused", "fails": "**fails**"}

HEAD = """\
The official Python SDK (`tinker` on PyPI) runs unmodified against the server that `tinkex serve`
starts. Point it there and give it any key of its own shape:

```bash
tinkex serve --port 8000
TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-anything python my_script.py
```

This page is written by `make conformance`, which runs `tests/official_sdk/scenario.py` with five
versions: {versions}. SDK 0.18.0 speaks JSON, 0.24.1
both JSON and protobuf, and from 0.25.0 on it is protobuf alone; the server speaks whichever it is
spoken to in, and trains to the same bits in both. "-" says that this version of the SDK does not
have the feature.
"""

REFUSED = """
## What the server does not offer

Each of these is refused at once, with the sentence on the right; nothing hangs and nothing is
silently ignored.
"""


def main(arguments: list[str]) -> int:
    chosen = [a for a in arguments if re.fullmatch(r"\d+\.\d+\.\d+", a)]
    words = [a for a in arguments if a not in chosen]
    results: dict[str, dict[str, dict[str, str]]] = {}
    for version in chosen or sdk.VERSIONS:
        sdk.python_of(version)
        with sdk.server() as url:
            lines, _ = sdk.scenario(version, url, *words)
            for line in lines:
                results.setdefault(line["feature"], {})[version] = line
                print(
                    f"{version:8} {line['feature']:60} {line['state']:8} "
                    f"{line['seconds']:6} s  {line['detail']}",
                    flush=True,
                )
    for line in alike(results):
        print(line)
    if not arguments:
        page.write("server", section(results))
        port.keep(sdk.surface(sdk.VERSIONS[-1]))
        page.write("port", port.section(port.snapshot()))
    failed = sum(line["state"] == "fails" for row in results.values() for line in row.values())
    ran = sum(len(row) for row in results.values())
    print(f"{ran - failed} of {ran} as they should be" + (f", {failed} FAILED" if failed else ""))
    return 0 if ran and not failed else 1


def alike(results: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """Where versions came to different numbers: these rows fail."""
    different = []
    for feature, row in results.items():
        values = {line["detail"] for line in row.values() if line["state"] == "works"}
        if len(values) > 1:
            different.append(f"{feature}: the versions differ: {sorted(values)}")
            for line in row.values():
                line["state"] = "fails"
    return different


def section(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """The part of docs/compatibility.md about our server."""
    offered, refused = [], []
    for feature, row in results.items():
        states = {line["state"] for line in row.values()}
        (refused if "refused" in states or "not refused" in str(row) else offered).append(feature)
    lines = [HEAD.format(versions=", ".join(sdk.VERSIONS))]
    cells = [
        [feature, *(MARKS[results[feature][version]["state"]] for version in sdk.VERSIONS)]
        for feature in offered
    ]
    lines += [page.table(["Feature", *sdk.VERSIONS], cells), REFUSED]
    answers = []
    for feature in refused:
        row = {v: line for v, line in results[feature].items() if line["state"] != "absent"}
        answers.append([feature, ", ".join(row), list(row.values())[-1]["detail"]])
    lines.append(page.table(["Feature", "SDK versions that have it", "Answer"], answers))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
