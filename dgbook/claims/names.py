"""How the pages name what results hold under short keys."""

LABELS = {
    "dg": "DG",
    "cfg": "CFG",
    "cfg+dg": "CFG + DG",
    "cfg-middle": "CFG, middle steps",
    "apg": "APG",
    "cfg++": "CFG++",
    "cfg-zero*": "CFG-Zero*",
    "cfg+pag": "CFG + PAG",
    "cfg+seg": "CFG + SEG",
    "cfg+slg": "CFG + SLG",
    "cfg+tpg": "CFG + token shuffling",
    "cfg+block-drop": "CFG + block drop",
    "cfg+autoguidance": "CFG + autoguidance",
    "uncond+dg": "uncond + DG",
    "cond+dg": "cond + DG",
    "ours": "as in this book",
    "every-1": "every step",
    "every-2": "every 2nd step",
    "every-3": "every 3rd",
    "every-4": "every 4th",
    "cosine-90": "cosine 0.9, at most 4",
    "cosine-70": "cosine 0.7, at most 4",
}
"""Settings that are not called by their keys ("none", "massive", "left half")."""


def label(key: str) -> str:
    """What people read for a setting's key."""
    return LABELS.get(key, key)
