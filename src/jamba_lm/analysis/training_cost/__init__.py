"""What training a shape costs on a mesh of devices: memory, arithmetic, communication, time."""
