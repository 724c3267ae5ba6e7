"""What score.py and app.py stand on; README.md in this folder says what is where."""
