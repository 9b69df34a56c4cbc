"""tmp."""
def run(workdir, config): pass
def plan_table(layers, plan):
    return [f'{p} {s}' for p,s in plan.items()][:5]
def metrics_table(protocol, rows):
    return [str(r) for r in rows]
