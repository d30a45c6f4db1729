"""What the exercises ask, what is right, and which mistakes are so common that they have a hint of their own."""
