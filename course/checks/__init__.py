"""What the exercises ask, and which mistakes are so common that they have a hint of their own."""
