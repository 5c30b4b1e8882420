BEGIN TRANSACTION;
CREATE TABLE fleet_audit (
	number INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	actor VARCHAR(80) NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	subject VARCHAR(64) NOT NULL, 
	detail TEXT NOT NULL, 
	PRIMARY KEY (number)
);
INSERT INTO "fleet_audit" VALUES(1,1.0,'ada','group added','lab','follows digits');
INSERT INTO "fleet_audit" VALUES(2,2.0,'ada','device added','cam-1','to group lab');
INSERT INTO "fleet_audit" VALUES(3,2.0,'ada','device added','cam-2','to group lab');
INSERT INTO "fleet_audit" VALUES(4,3.0,'fleet','device told','cam-1','digits 1');
INSERT INTO "fleet_audit" VALUES(5,4.0,'ada','rollout started','r2','digits 2 to lab: 100 %');
INSERT INTO "fleet_audit" VALUES(6,5.0,'fleet','device told','cam-1','digits 2');
INSERT INTO "fleet_audit" VALUES(7,5.0,'fleet','device told','cam-2','digits 2');
INSERT INTO "fleet_audit" VALUES(8,6.0,'device:cam-2','release failed','cam-2','digits 2: self-test failed: off by 0.5');
INSERT INTO "fleet_audit" VALUES(9,6.0,'fleet','device told','cam-2','digits 1');
INSERT INTO "fleet_audit" VALUES(10,7.0,'ada','rollout paused','r2','lunch');
CREATE TABLE fleet_devices (
	id VARCHAR(64) NOT NULL, 
	group_id VARCHAR(64) NOT NULL, 
	pin BIGINT, 
	revoked BOOLEAN NOT NULL, 
	running BIGINT, 
	agent VARCHAR(64) NOT NULL, 
	last_seen DOUBLE, 
	refused JSON NOT NULL, 
	serial INTEGER NOT NULL, 
	told_version BIGINT, 
	told_at DOUBLE, 
	told_rollout VARCHAR(64), 
	told_outcome VARCHAR(32), 
	part_rollout VARCHAR(64), 
	part_stage INTEGER, 
	part_progress VARCHAR(16), 
	part_told_at DOUBLE, 
	part_epoch INTEGER, 
	PRIMARY KEY (id), 
	FOREIGN KEY(group_id) REFERENCES fleet_groups (id)
);
INSERT INTO "fleet_devices" VALUES('cam-1','lab',NULL,0,1,'0.1.0',5.0,'[]',2,2,5.0,'r2',NULL,'r2',0,'told',5.0,1);
INSERT INTO "fleet_devices" VALUES('cam-2','lab',NULL,0,1,'',6.0,'[2]',2,1,6.0,NULL,NULL,'r2',0,'failed',5.0,1);
CREATE TABLE fleet_groups (
	id VARCHAR(64) NOT NULL, 
	release VARCHAR(64) NOT NULL, 
	stable BIGINT, 
	pin BIGINT, 
	rollout VARCHAR(64), 
	PRIMARY KEY (id), 
	FOREIGN KEY(rollout) REFERENCES fleet_rollouts (id)
);
INSERT INTO "fleet_groups" VALUES('lab','digits',1,NULL,'r2');
CREATE TABLE fleet_health (
	device VARCHAR(64) NOT NULL, 
	at DOUBLE NOT NULL, 
	document JSON NOT NULL, 
	PRIMARY KEY (device), 
	FOREIGN KEY(device) REFERENCES fleet_devices (id)
);
INSERT INTO "fleet_health" VALUES('cam-2',6.0,'{"error": "hot", "figures": {"celsius": 71.5}, "made": 6.0}');
CREATE TABLE fleet_meta (
	"key" VARCHAR(32) NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "fleet_meta" VALUES('schema','2');
INSERT INTO "fleet_meta" VALUES('repository','/srv/repository');
CREATE TABLE fleet_receipts (
	number INTEGER NOT NULL, 
	device VARCHAR(64) NOT NULL, 
	report VARCHAR(64) NOT NULL, 
	at DOUBLE NOT NULL, 
	PRIMARY KEY (number), 
	UNIQUE (device, report), 
	FOREIGN KEY(device) REFERENCES fleet_devices (id)
);
INSERT INTO "fleet_receipts" VALUES(1,'cam-2','report01',6.0);
CREATE TABLE fleet_reports (
	number INTEGER NOT NULL, 
	at DOUBLE NOT NULL, 
	device VARCHAR(64) NOT NULL, 
	serial INTEGER NOT NULL, 
	version BIGINT NOT NULL, 
	rollout VARCHAR(64), 
	outcome VARCHAR(32) NOT NULL, 
	detail TEXT NOT NULL, 
	PRIMARY KEY (number)
);
INSERT INTO "fleet_reports" VALUES(1,6.0,'cam-2',1,2,'r2','self-test failed','off by 0.5');
CREATE TABLE fleet_rollouts (
	id VARCHAR(64) NOT NULL, 
	release VARCHAR(64) NOT NULL, 
	version BIGINT NOT NULL, 
	groups JSON NOT NULL, 
	stages JSON NOT NULL, 
	policy JSON NOT NULL, 
	cohorts JSON NOT NULL, 
	since DOUBLE NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	stage INTEGER NOT NULL, 
	epoch INTEGER NOT NULL, 
	expected INTEGER NOT NULL, 
	succeeded INTEGER NOT NULL, 
	failed INTEGER NOT NULL, 
	silent INTEGER NOT NULL, 
	told INTEGER NOT NULL, 
	settled INTEGER NOT NULL, 
	reason TEXT NOT NULL, 
	started DOUBLE NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "fleet_rollouts" VALUES('r2','digits',2,'["lab"]','[100.0]','{"max_error_rate": 1.0, "max_silent_rate": 0.5, "min_reports": 2, "report_deadline": 3600.0, "soak": 0.0, "timeout": 86400.0, "automatic": true, "roll_back_on_error": false}','[2]',4.0,'paused',0,1,2,0,1,0,2,1,'lunch',4.0);
CREATE TABLE fleet_tokens (
	hash VARCHAR(64) NOT NULL, 
	device VARCHAR(64) NOT NULL, 
	created DOUBLE NOT NULL, 
	PRIMARY KEY (hash), 
	FOREIGN KEY(device) REFERENCES fleet_devices (id)
);
INSERT INTO "fleet_tokens" VALUES('08845400f691d7c79a1c40baf0d2994f55b25efe7f83f4b9c3507d3c514d8a0e','cam-1',2.0);
INSERT INTO "fleet_tokens" VALUES('fb344b3afdf7d7bb128de661867a96ff345e61e718f14e31ebc10ae75cfa26bb','cam-2',2.0);
CREATE INDEX ix_fleet_rollouts_status ON fleet_rollouts (status);
CREATE INDEX ix_fleet_reports_device ON fleet_reports (device);
CREATE INDEX ix_fleet_audit_subject ON fleet_audit (subject);
CREATE INDEX fleet_devices_overdue ON fleet_devices (part_rollout, part_progress, part_told_at);
CREATE INDEX ix_fleet_devices_group_id ON fleet_devices (group_id);
CREATE INDEX ix_fleet_tokens_device ON fleet_tokens (device);
COMMIT;
