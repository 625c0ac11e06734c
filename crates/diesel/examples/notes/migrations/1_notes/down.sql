DROP TABLE notes;
DROP TABLE visits;
