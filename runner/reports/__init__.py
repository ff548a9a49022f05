"""What people read: the console, the page of a comparison, its pictures; and JUnit, which CI reads."""
