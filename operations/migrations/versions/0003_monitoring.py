"""What monitoring finds, and what it looks at besides the propensities of messages"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
COLUMNS = {"language": sa.String(40), "sender_kind": sa.String(10), "characters": sa.Integer(), "digits": sa.Integer()}


def upgrade():
    op.create_table(
        "drift",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("created", sa.BigInteger(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("end", sa.BigInteger(), nullable=False),
        sa.Column("model", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    for day in op.get_bind().scalars(sa.text("SELECT day FROM days")).all():
        for name, of_type in COLUMNS.items():
            op.add_column(f"messages_{day}", sa.Column(name, of_type))
