"""Images and captions, encoded once and drawn by number; data that a teacher generates."""
