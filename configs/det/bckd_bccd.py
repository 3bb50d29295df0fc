# The factor |p_s - p_t| alone, the weight of BCKD (ICCV 2023).
_base_ = ['wsl_bccd.py']

model = dict(
    distiller=dict(distill_losses=dict(loss_wsl=dict(weighting=dict(_delete_=True, type='DisagreementWeighting'))))
)
