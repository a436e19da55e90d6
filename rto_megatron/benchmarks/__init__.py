"""The paper's benchmarks: answers to AlpacaEval 2 and Arena-Hard, their judging, and the win rates of both."""
