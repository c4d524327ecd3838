"""Rewards as pure functions of text: what makes an answer unfit whatever it says, and constraints that can be checked."""
