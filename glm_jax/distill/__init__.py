"""From experts to one model: which of their answers are kept, and how they are told again."""
