"""A user study like the paper's (Fig. 17): one HTML page of blinded pairs, and win rates from its answers."""

from dgkit.study.analysis import Outcome, analyse
from dgkit.study.page import QUESTIONS, Key, make

__all__ = ["QUESTIONS", "Key", "Outcome", "analyse", "make"]
