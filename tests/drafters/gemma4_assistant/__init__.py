"""Tests of the drafter that reads its model's keys and values."""
