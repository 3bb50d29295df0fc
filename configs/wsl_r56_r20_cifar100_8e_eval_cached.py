_base_ = 'wsl_r56_r20_cifar100_8e_eval.py'

# made by: tools/cache_teacher.py configs/wsl_r56_r20_cifar100_8e_eval.py --views 8
# With a view for each epoch, seed 0 trains exactly the student of the config without a cache.
model = dict(teacher_cache='work_dirs/wsl_r56_r20_cifar100_8e_eval/teacher_cache')
train_dataloader = dict(
    dataset=dict(type='mmwsl.CachedViews', cache='work_dirs/wsl_r56_r20_cifar100_8e_eval/teacher_cache')
)
