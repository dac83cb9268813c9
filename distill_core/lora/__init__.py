"""LoRAs: names and tensors, remapping to a student, trained layers, switching between LoRAs."""
