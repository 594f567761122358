"""dpo-kit: Direct Preference Optimization, notebook first.

Nothing is imported here, so that `import dpo_kit` costs nothing and every room (data, engine, viewing)
can be used without the packages of the others. Import the module you need: `from dpo_kit import launch`.
"""

__version__ = "0.1.0"
