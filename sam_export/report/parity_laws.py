"""The laws and the user's own loop, in a parity report for people."""

from __future__ import annotations

from html import escape

from sam_export.report.parity_words import Values

_WORDS = {"ok": "holds", "FAIL": "broken", "not applicable": "does not apply"}


def law_rows(values: Values) -> list[tuple[str, str, str, str]]:
    """Whose law, the law, whether it holds, and the detail; eager's own first, broken ones first.

    Args:
        values: A report as JSON values.
    """
    rows = [("eager", law) for law in values["laws"]]
    rows += [(target["name"], law) for target in values["targets"] for law in target["laws"]]
    rows.sort(key=lambda row: row[1]["verdict"] != "FAIL")
    return [(who, law["name"], _WORDS[law["verdict"]], law["detail"]) for who, law in rows]


def reference_sentence(values: Values) -> str:
    """How the user's loop compares; empty where none was given."""
    found = values["reference"]
    if found is None:
        return ""
    if found["equal"]:
        return f"Your loop is the same step ({found['steps']} steps compared)."
    why = " and ".join(found["differs_in"]) or "none of the known choices explains it"
    return f"Your loop is another step: {why}."


def laws_section(values: Values) -> str:
    """The section of the HTML page; empty where no law was tried."""
    rows = law_rows(values)
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(who)}</th><td>{escape(name)}</td>'
        f'<td class="{"bad" if word == "broken" else ""}">{word}</td><td>{escape(detail)}</td></tr>'
        for who, name, word, detail in rows
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("of", "law", "", "found"))
    return (
        '<h2 id="laws">Laws</h2><p class="soft small">What is true of any right step; tried on '
        "eager in float64 first, and not applied where it does not hold there.</p>"
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def broken_laws(values: Values) -> list[str]:
    """A sentence for each law that is broken."""
    return [
        f"{who} breaks a law: {name} ({detail})"
        for who, name, word, detail in law_rows(values)
        if word == "broken"
    ]
