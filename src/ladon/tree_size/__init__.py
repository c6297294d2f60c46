"""How many nodes a step verifies: policies, and the models of latency and acceptance that they use."""
