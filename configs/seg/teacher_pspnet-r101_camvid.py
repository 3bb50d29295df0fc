# Not trained here.
_base_ = ['student_pspnet-r18_camvid.py']

model = dict(_delete_=True, **_base_.camvid_teacher)
