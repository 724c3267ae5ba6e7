"""Parts of closed days"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    op.create_table(
        "parts",
        sa.Column("file", sa.String(length=60), nullable=False),
        sa.Column("day", sa.String(length=8), nullable=False),
        sa.Column("scores", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("file"),
    )
    op.create_index(op.f("ix_parts_day"), "parts", ["day"], unique=False)
