"""What export_coreml.py leans on: the phone's forms of the networks, and a Core ML program computed op by op."""
