"""What an operator does with the filter beyond the assignments; README.md in this folder says what is where."""
