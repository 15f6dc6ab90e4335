"""kvopt's exports on engines that serve: what a real engine answers against kvopt's own greedy answers."""
