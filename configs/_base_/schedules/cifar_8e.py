# A thirtieth of the usual schedule, for comparisons on a CPU: about 20 minutes on two cores.
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True))
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=0.005, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=8, eta_min=0, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=8, val_interval=1)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=128)
