"""The page that a person looks at after an evaluation, and what is drawn on it."""
