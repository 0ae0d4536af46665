"""A user study like the paper's (Fig. 17): one HTML page of blinded pairs, and win rates from its answers."""

from dgbook.paper_scale.study.analysis import Outcome, analyse
from dgbook.paper_scale.study.page import QUESTIONS, Key, make

__all__ = ["QUESTIONS", "Key", "Outcome", "analyse", "make"]
