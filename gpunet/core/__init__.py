"""What all else stands on: the traced list of launches, its memory plan, and its replay."""
