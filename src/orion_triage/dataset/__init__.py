"""Places, imagery and the records that training and evaluation read."""
