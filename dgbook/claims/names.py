"""How the pages name what results hold under short keys."""

METHODS = {
    "none": "none",
    "cfg": "CFG",
    "cfg-middle": "CFG, middle steps",
    "apg": "APG",
    "cfg++": "CFG++",
    "cfg-zero*": "CFG-Zero*",
    "cfg+dg": "CFG + DG",
    "cfg+pag": "CFG + PAG",
    "cfg+seg": "CFG + SEG",
    "cfg+slg": "CFG + SLG",
    "cfg+tpg": "CFG + token shuffling",
    "cfg+block-drop": "CFG + block drop",
    "cfg+autoguidance": "CFG + autoguidance",
}
"""The methods of chapter 5, the keys of its table "methods"."""
