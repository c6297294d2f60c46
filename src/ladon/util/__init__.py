"""Files and the machine: what every package may use."""
