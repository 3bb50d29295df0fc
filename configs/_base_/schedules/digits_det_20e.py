optim_wrapper = dict(optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.05), clip_grad=dict(max_norm=10))
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, eta_min=0.0)

train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=5)
val_cfg = dict()
test_cfg = dict()

auto_scale_lr = dict(base_batch_size=10)
